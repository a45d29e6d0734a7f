"""What is made of predictions: scores, their means and intervals, tables and the report."""
