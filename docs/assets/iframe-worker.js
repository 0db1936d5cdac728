// Search on pages opened from the disk: browsers start no worker from file://, so a hidden frame runs its script.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.frame = frame.contentWindow
      this.frame.document.open()
      this.frame.document.write("<!doctype html><body></body>")
      this.frame.document.close()
      this.frame.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.frame.importScripts = () => {}
      const script = this.frame.document.createElement("script")
      script.src = url
      this.ready = new Promise(done => { script.onload = done })
      this.frame.document.body.appendChild(script)
    }
    postMessage(data) {
      this.ready.then(() => this.frame.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
