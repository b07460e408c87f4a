"""Cases that go wrong on purpose."""
