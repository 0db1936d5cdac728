"""What several tests share: small models, servers, readers of other people's formats."""
