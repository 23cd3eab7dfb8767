"""Images to batches: data sets, folders, preprocessing, augmentation, loaders."""
