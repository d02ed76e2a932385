"""Watching a run: a terminal dashboard that reads a run's plan and events, and owns nothing in the job."""
