"""A package, so that pytest puts the checkout on sys.path and not tests/, where `fid` would name the wrong folder."""
