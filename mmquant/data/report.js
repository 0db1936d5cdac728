"use strict";
for (const button of document.querySelectorAll("button")) {
  button.addEventListener("click", async () => {
    const line = button.parentElement.querySelector("pre");
    let copied = true;
    try {
      await navigator.clipboard.writeText(line.textContent);
    } catch {
      getSelection().selectAllChildren(line); // pages opened from a disk may not write to the clipboard
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
