"""The worker: claims jobs, trains adapters. Needs torch; a GPU makes it fast."""
