def render_demo(result): return "x"
