"""The command line: options to one library call to what is shown. Nothing else imports this package."""
