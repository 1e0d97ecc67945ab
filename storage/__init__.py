"""Objects in S3: the only place that speaks to it. It knows no domain."""
