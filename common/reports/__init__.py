"""What is made of finished runs: their records, tables over seeds, figures."""
