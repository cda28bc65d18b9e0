"""Using a loaded model: one module for each thing people do with it."""
