"""What the tests share: rank processes, synthetic models, set-up inside a rank."""
