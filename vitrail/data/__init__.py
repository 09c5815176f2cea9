"""Pictures in: decoding, preprocessing, augmentation, data sets and batches."""
