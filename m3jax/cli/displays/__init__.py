"""What commands say of their results: lines for people, plain data for JSON."""
