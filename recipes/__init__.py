"""Runnable LightningModules and DataModules."""
