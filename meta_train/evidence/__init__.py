"""What results show: tables, figures, responses and model cards, all made from committed CSV files."""
