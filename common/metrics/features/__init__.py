"""What is computed of images' features: distances, their uncertainty, nearest neighbours."""
