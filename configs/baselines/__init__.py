"""The systems that SAM-Mix is compared with, each on the phantom or on LiTS."""
