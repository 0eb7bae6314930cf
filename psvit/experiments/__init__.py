"""The project's experiments: what each gains, controls included. ``psvit experiment`` runs them."""
