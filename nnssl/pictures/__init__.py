"""Pictures of images with the contours of masks."""
