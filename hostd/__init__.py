"""What runs on VM hosts: standard library only."""
