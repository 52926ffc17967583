package bevywise

// Routes returns every route as "METHOD /path".
func Routes() []string {
	var list []string
	for _, r := range (&api{}).routes() {
		list = append(list, r.method+" "+r.path)
	}
	return list
}
