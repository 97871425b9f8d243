"""Files of images, volumes and masks."""
