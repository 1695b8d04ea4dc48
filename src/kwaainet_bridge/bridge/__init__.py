"""What joins the two stacks: routes over servers of both networks."""
