"""Disks kept in S3."""
