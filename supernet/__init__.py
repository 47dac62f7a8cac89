"""What a network is: specs, architectures, spaces, and the modules that realise them. Imports nothing from `nas`."""
