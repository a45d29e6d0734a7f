"""Files to batches: scans, masks, layouts of folders, splits and the slice store."""
