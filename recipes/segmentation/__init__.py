"""Semantic segmentation: any smp architecture on a folder of images and masks, or on built-in texture photographs."""
