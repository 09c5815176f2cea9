"""Answers over HTTP: transport, queues and bounds. What is computed stands in vitrail.jobs.serve."""
