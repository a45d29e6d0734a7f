"""The networks that SAM-Mix is compared with."""
