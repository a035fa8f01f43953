"""How generators' measurements are told and shown."""
