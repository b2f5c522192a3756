"""Training: fine-tuning that resumes exactly, and evaluation, in one process or many."""
