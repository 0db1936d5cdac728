"""Test helpers: small models, servers, readers of other tools' formats."""
