"""One file a resource. A route parses, calls one function of the rules, and shapes the answer."""
