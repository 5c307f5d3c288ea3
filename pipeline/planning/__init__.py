"""Planning: from scene headers to tiles, slots, splits and labels; no pixel is read."""
