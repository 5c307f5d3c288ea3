"""Settings: what can be configured, presets, loading, words for mistakes."""
