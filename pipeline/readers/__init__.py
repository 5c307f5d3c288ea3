"""Opening the assets of scenes: raster files and array variables, read by window."""
