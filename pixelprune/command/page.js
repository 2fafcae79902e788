"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function make(parent, name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text; // never as markup
  if (parent) parent.append(element);
  return element;
}

function draw(parent, name, className, attributes) {
  const element = document.createElementNS(SVG, name);
  element.setAttribute("class", className);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
}

// A picture { source, size } with its omitted blocks { rows, cols, omitted } veiled, where there are any; what is drawn
// into the result lies over it, in its pixels.
function showPicture(parent, picture, mask) {
  const figure = make(parent, "figure");
  figure.tabIndex = 0;
  const image = make(figure, "img");
  image.alt = "";
  image.src = picture.source;
  const [width, height] = picture.size;
  const over = draw(figure, "svg", "over", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" });
  if (mask) {
    const [wide, high] = [width / mask.cols, height / mask.rows];
    let path = "";
    mask.omitted.forEach(([row, first, count]) => {
      path += `M${first * wide} ${row * high}h${count * wide}v${high}h${-count * wide}z`;
    });
    draw(over, "path", "omitted", { d: path });
  }
  return over;
}

