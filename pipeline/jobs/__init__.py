"""Jobs: what reads, scores, writes and commits, as Dask tasks."""
