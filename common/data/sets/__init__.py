"""The data sets by name, each brought to an ImageSet."""
