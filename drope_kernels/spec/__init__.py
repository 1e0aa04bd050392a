"""What a call is, in words that everything above and below shares: data, parts, memory order."""
