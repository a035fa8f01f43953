"""Where a mixture comes from: EM with k-means++ seeding, and moving averages over batches."""
