"""What device, host and third parties promise each other. errors, plan and tensors are plain Python."""
