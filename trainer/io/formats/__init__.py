"""How other programs name and store what Menma reads and writes."""
