"""What merging costs in accuracy, on images with labels."""
