"""The engines that plans are made for: what each can carry out, and what that costs."""
