package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strconv"
	"strings"
)

// A chartOf says what of a group's results is drawn, over the x of its scenarios.
type chartOf struct {
	file  string // name below plots, without .svg
	title string
	x, y  string
	lines []lineOf
}

// A lineOf is one line for each broker.
type lineOf struct {
	line   string // of the scenarios
	label  string // after the broker's name
	column column
}

// A chart is lines over two logarithmic axes.
type chart struct {
	title  string
	x, y   string // what the axes show, with units
	series []series
}

// A series is one line. Its colour is the broker's, its dashes are those of
// the same line of each broker.
type series struct {
	label  string
	broker int
	dash   int
	points []point
}

type point struct{ x, y float64 }

// Colours that can be told apart by everyone, on the white that every chart
// brings with it: so it reads the same on a light page and on a dark one.
var colours = []string{"#0b62a4", "#d9541e", "#3a7d2c"}

var dashes = []string{"", "7 4", "2 4"}

const (
	chartWidth  = 760
	chartHeight = 440
	plotLeft    = 100
	plotRight   = chartWidth - 24
	plotTop     = 92
	plotBottom  = chartHeight - 64
)

// An axis maps the logarithm of values to a range of pixels.
type axis struct {
	low, high float64
	from, to  float64
}

// newAxis covers the values from one round number to another.
func newAxis(values []float64, from, to float64) axis {
	low, high := slices.Min(values), slices.Max(values)
	a := axis{low: roundDown(low), from: from, to: to}
	a.high = a.low
	for a.high < high*(1-1e-9) || a.high == a.low {
		a.high = nextRound(a.high)
	}
	return a
}

func (a axis) at(v float64) float64 {
	return a.from + (math.Log(v)-math.Log(a.low))/(math.Log(a.high)-math.Log(a.low))*(a.to-a.from)
}

// roundDown returns the largest of 1, 2 and 5 times a power of ten that is not above v.
func roundDown(v float64) float64 {
	p := math.Pow(10, math.Floor(math.Log10(v)))
	for _, m := range []float64{10, 5, 2} {
		if m*p <= v*(1+1e-9) {
			return m * p
		}
	}
	return p
}

func nextRound(v float64) float64 {
	p := math.Pow(10, math.Floor(math.Log10(v)+1e-9))
	for _, m := range []float64{2, 5, 10} {
		if m*p > v*(1+1e-9) {
			return m * p
		}
	}
	return 20 * p
}

// ticks returns round numbers along the axis, those to be labelled: all, or
// only the powers of ten where there are many.
func (a axis) ticks() (all []float64, labelled func(float64) bool) {
	for v := a.low; v <= a.high*(1+1e-9); v = nextRound(v) {
		all = append(all, v)
	}
	many := len(all) > 10
	return all, func(v float64) bool {
		power := math.Log10(v)
		return !many || math.Abs(power-math.Round(power)) < 1e-9
	}
}

// axisNumber writes a number of an axis.
func axisNumber(v float64) string {
	if v >= 1 {
		return thousands(int(math.Round(v)))
	}
	return strconv.FormatFloat(v, 'g', 1, 64)
}

// svg draws the chart.
func (c chart) svg() string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	text := func(x, y float64, attributes, s string) {
		p(`<text x="%.1f" y="%.1f" %s>%s</text>`, x, y, attributes, html.EscapeString(s))
	}
	svgHead(p, c.title, chartHeight)

	var xs, ys []float64
	for _, s := range c.series {
		for _, pt := range s.points {
			xs, ys = append(xs, pt.x), append(ys, pt.y)
		}
	}
	if len(xs) == 0 {
		text(chartWidth/2, chartHeight/2, `text-anchor="middle"`, "nothing was measured")
		p("</svg>")
		return b.String()
	}
	// The measured values are the marks of the x axis.
	x := axis{low: slices.Min(xs), high: slices.Max(xs), from: plotLeft + 20, to: plotRight - 20}
	if x.low == x.high {
		x.low, x.high = x.low/2, x.high*2
	}
	y := newAxis(ys, plotBottom, plotTop)

	all, labelled := y.ticks()
	for _, v := range all {
		width := 0.5
		if labelled(v) {
			width = 1
			text(plotLeft-8, y.at(v)+4, `text-anchor="end"`, axisNumber(v))
		}
		p(`<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#d4d4d4" stroke-width="%g"/>`, plotLeft, y.at(v), plotRight, y.at(v), width)
	}
	slices.Sort(xs)
	for _, v := range slices.Compact(xs) {
		p(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#d4d4d4" stroke-width="1"/>`, x.at(v), plotTop, x.at(v), plotBottom)
		text(x.at(v), plotBottom+20, `text-anchor="middle"`, axisNumber(v))
	}
	p(`<path d="M%d %dV%dH%d" fill="none" stroke="#444" stroke-width="1"/>`, plotLeft, plotTop, plotBottom, plotRight)
	text((plotLeft+plotRight)/2, chartHeight-18, `text-anchor="middle"`, c.x)
	text(0, 0, fmt.Sprintf(`text-anchor="middle" transform="translate(18 %d) rotate(-90)"`, (plotTop+plotBottom)/2), c.y)

	for i, s := range c.series {
		colour, dash := colours[s.broker%len(colours)], dashes[s.dash%len(dashes)]
		var line []string
		for _, pt := range s.points {
			line = append(line, fmt.Sprintf("%.1f,%.1f", x.at(pt.x), y.at(pt.y)))
		}
		stroke := fmt.Sprintf(`fill="none" stroke="%s" stroke-width="2.2"`, colour)
		if dash != "" {
			stroke += fmt.Sprintf(` stroke-dasharray="%s"`, dash)
		}
		p(`<polyline points="%s" %s/>`, strings.Join(line, " "), stroke)
		for _, pt := range s.points {
			mark(p, x.at(pt.x), y.at(pt.y), s.broker, colour)
		}
		// The legend: a column for each line of the brokers, a row for each broker.
		lx, ly := float64(plotLeft+s.dash*210), float64(52+s.broker*20)
		p(`<path d="M%.1f %.1fh34" %s/>`, lx, ly-4, stroke)
		mark(p, lx+17, ly-4, c.series[i].broker, colour)
		text(lx+42, ly, "", s.label)
	}
	p("</svg>")
	return b.String()
}

// mark draws a point, of another shape for each broker.
func mark(p func(string, ...any), x, y float64, broker int, colour string) {
	if broker == 0 {
		p(`<circle cx="%.1f" cy="%.1f" r="4" fill="%s"/>`, x, y, colour)
		return
	}
	p(`<rect x="%.1f" y="%.1f" width="7.6" height="7.6" fill="%s"/>`, x-3.8, y-3.8, colour)
}

func svgHead(p func(string, ...any), title string, height int) {
	p(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" font-family="sans-serif" font-size="13" fill="#222">`,
		chartWidth, height, chartWidth, height)
	p(`<title>%s</title>`, html.EscapeString(title))
	p(`<rect width="%d" height="%d" rx="8" fill="#ffffff"/>`, chartWidth, height)
	p(`<text x="%d" y="27" font-size="16" font-weight="bold">%s</text>`, plotLeft, html.EscapeString(title))
}

// rows are a line for each thing compared, with a mark for each broker on a
// logarithmic axis.
type rows struct {
	title, x string
	brokers  []string
	rows     []row
}

type row struct {
	label  string
	values []float64 // by broker, NaN when not measured
}

func (c rows) svg() string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	text := func(x, y float64, attributes, s string) {
		p(`<text x="%.1f" y="%.1f" %s>%s</text>`, x, y, attributes, html.EscapeString(s))
	}
	const left, top, step = 226, 76, 24
	bottom := top + step*len(c.rows)
	svgHead(p, c.title, bottom+54)
	var values []float64
	for _, r := range c.rows {
		for _, v := range r.values {
			if v > 0 {
				values = append(values, v)
			}
		}
	}
	if len(values) == 0 {
		text(chartWidth/2, top, `text-anchor="middle"`, "nothing was measured")
		p("</svg>")
		return b.String()
	}
	a := newAxis(values, left+44, chartWidth-50)
	all, labelled := a.ticks()
	for _, v := range all {
		if labelled(v) {
			p(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#d4d4d4" stroke-width="1"/>`, a.at(v), top-8, a.at(v), bottom)
			text(a.at(v), float64(bottom+18), `text-anchor="middle"`, axisNumber(v))
		}
	}
	for i, name := range c.brokers {
		mark(p, float64(plotLeft+i*150+6), 48, i, colours[i%len(colours)])
		text(float64(plotLeft+i*150+18), 53, "", name)
	}
	for n, r := range c.rows {
		y := float64(top + step*n + step/2)
		text(left-4, y+4, `text-anchor="end"`, r.label)
		low, high := math.Inf(1), math.Inf(-1)
		for _, v := range r.values {
			if v > 0 {
				low, high = min(low, v), max(high, v)
			}
		}
		if low < high {
			p(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#9a9a9a" stroke-width="2"/>`, a.at(low), y, a.at(high), y)
		}
		for i, v := range r.values {
			if !(v > 0) {
				continue
			}
			mark(p, a.at(v), y, i, colours[i%len(colours)])
			// The number stands outside, where no line is.
			if v == high {
				text(a.at(v)+9, y+4, `font-size="11"`, shortNumber(v))
			} else {
				text(a.at(v)-9, y+4, `font-size="11" text-anchor="end"`, shortNumber(v))
			}
		}
	}
	p(`<path d="M%d %dV%dH%d" fill="none" stroke="#444" stroke-width="1"/>`, left+4, top-8, bottom, chartWidth-24)
	text((left+chartWidth-50)/2, float64(bottom+40), `text-anchor="middle"`, c.x)
	p("</svg>")
	return b.String()
}

// shortNumber writes a number with two or three digits.
func shortNumber(v float64) string {
	switch {
	case v < 1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	case v < 100:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return thousands(int(math.Round(v)))
}
