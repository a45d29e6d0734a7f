"""What can be trained and scored: SAM-Mix, and the systems it is compared with."""
