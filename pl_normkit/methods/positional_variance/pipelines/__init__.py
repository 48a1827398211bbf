"""Reading the pipelines of other libraries (timm, torchvision, albumentations): which transforms act, and what they do to variance."""
