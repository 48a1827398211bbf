"""Weight decay that knows what each parameter is for."""
