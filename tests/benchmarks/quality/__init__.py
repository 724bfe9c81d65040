"""What ``quantizer_quality`` is made of: texts, an oracle, the methods, and the table."""
