"""What is made of a trained classifier: scores and their pictures, predictions for a folder, a model to pass on."""
